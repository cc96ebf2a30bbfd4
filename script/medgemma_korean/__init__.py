"""What more than one stage of the MedGemma Korean pipeline needs."""
