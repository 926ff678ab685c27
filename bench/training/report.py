def write(out, scale):
    pass
