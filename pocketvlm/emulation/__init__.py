"""Programs of other machines computed in numpy, to certify without such a machine."""
