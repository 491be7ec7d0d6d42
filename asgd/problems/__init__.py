"""Problems: a loss, its gradients and its gradient noise, vectorised over paths."""
