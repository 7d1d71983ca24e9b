"""The one error that the course raises: what happened, and what to do about it.

It knows nothing about where it is shown. A notebook and a terminal both print its two sentences.
"""


class CourseError(Exception):
    """A failure that the reader can do something about.

    Parameters
    ----------
    what : str
        One sentence: what happened, to which thing.
    fix : str
        One sentence: what to do next.
    """

    def __init__(self, what, fix):
        Exception.__init__(self, what, fix)
        self.what = what
        self.fix = fix

    def __str__(self):
        return self.what + " " + self.fix

    def _render_traceback_(self):
        # IPython asks an exception for this: a notebook shows the two sentences
        # where it would otherwise show a page of stack frames.
        return ["CourseError: " + self.what, self.fix]
