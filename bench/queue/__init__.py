"""Ways to keep a queue of tasks with deadlines short, and the runs that compare them."""
