"""What kinds of layer there are, and how each of them is one linear layer or several."""
