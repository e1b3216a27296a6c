"""A model with a hole, or only its middle: where the cut is, what each side loads, which model it is, and the
adapter that comes out. Knows transformers and PEFT, no socket."""
