"""How good a trained model is, in numbers; the same for both families."""
