"""What comes after a merge: the directory goes to the Hugging Face Hub."""
