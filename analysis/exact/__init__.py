"""Results without paths: moments for linear gradients, limits of stability, batch schedules."""
