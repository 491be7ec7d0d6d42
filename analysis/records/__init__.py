"""What a record without parameters tells: its law, its means, and what a cap would cost."""
