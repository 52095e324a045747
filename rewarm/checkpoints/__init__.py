"""Files that are whole or not there, and the weights of any checkpoint."""
