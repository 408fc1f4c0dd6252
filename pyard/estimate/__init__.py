"""What a student and a whole recipe cost."""
