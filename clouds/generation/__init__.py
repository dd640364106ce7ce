"""From prompts to painted street scenes."""
