"""The confinement of scripts: the trainer checks it, the zygote builds it, the child enters it."""
