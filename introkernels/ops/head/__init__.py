"""What the linear heads of all GPU backends share: products of the matrix library, by chunks."""
