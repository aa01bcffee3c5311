"""An adapted layer as plain weights: the affine map that it computes, and merging."""
