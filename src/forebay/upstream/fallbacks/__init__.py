"""Fallbacks: the setting, the routes that it leads to, and the accounts that one call tries."""
