"""What a compressed model consists of; one file for each form."""
