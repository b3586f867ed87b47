"""What other libraries load of ssmc: models and a quantizer of transformers, a model of lm-eval."""
