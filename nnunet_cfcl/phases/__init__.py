"""What a trainer runs besides its fine-tuning: the generator phase and the pretraining phase, and what they need."""
