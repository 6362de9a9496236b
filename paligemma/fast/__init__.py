"""What makes the model faster or smaller and changes no mathematics."""
