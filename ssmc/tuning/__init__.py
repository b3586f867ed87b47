"""Which operators take how many bits: variants of one calibrated graph, scored and searched."""
