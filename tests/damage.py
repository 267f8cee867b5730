"""Ways to damage a data folder: each returns a function of the folder."""


def both(*steps):
    return lambda root: [step(root) for step in steps]


def link_out(name):
    """Move a file or folder out of the data folder and leave a link in its place."""

    def apply(root):
        (root / name).rename(root.parent / "outside")
        (root / name).symlink_to(root.parent / "outside")

    return apply


def remove(name):
    return lambda root: (root / name).unlink()


def write(name, content):
    def apply(root):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply
