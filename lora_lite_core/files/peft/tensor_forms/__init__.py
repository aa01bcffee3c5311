"""How PEFT keeps tensors of other kinds of layer, tied rows of tokens, and biases."""
