"""What remains of a long text on a pretrained model: what is read, in which ways, and how much of it is found."""
