"""The worker processes of one gateway, and how they answer and reload as one."""
