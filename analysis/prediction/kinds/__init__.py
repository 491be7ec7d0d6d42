"""The models of a loss curve, one in each file; `analysis.prediction.model` lists them."""
