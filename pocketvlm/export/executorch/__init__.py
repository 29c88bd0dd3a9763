"""One ExecuTorch program: `target` is the stage, the others are what it is made of."""
