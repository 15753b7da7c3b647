"""The metrics of a gateway: what each one means, where its numbers come from, and those of all workers as one."""
