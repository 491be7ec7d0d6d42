"""What needs no paths: moments of linear gradients, limits of stability, batch schedules."""
