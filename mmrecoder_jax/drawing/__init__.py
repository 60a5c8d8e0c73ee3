"""Charts of anyone, redrawn as code: who writes it, what comes of it, what a person gets to see."""
