"""The tensors of one adapter: declared, made, put on layers and on the model."""
