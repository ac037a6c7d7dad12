"""From text to Megatron's data sets: vocabularies, and the .bin/.idx pairs that preprocessing writes."""
