"""The sensitivity protocol: which layers lose accuracy or speed when quantized, why, and a recipe that does better."""
