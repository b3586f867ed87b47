"""What other libraries load of ssmc: its quantizer and its models, as transformers defines them."""
