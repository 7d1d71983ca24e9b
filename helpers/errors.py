"""The one error that the course raises: what happened, what to do about it, and a code for programs.

It is read by whatever Python a user has, to say which one the course needs: no newer syntax here.
"""


class CourseError(Exception):
    """A failure that the reader can do something about.

    Parameters
    ----------
    code : str
        What kind of failure it is, such as ``"disk-full"``. It stays when the sentences get better.
    what : str
        One sentence: what happened, to which thing.
    fix : str
        One sentence: what to do next.
    """

    def __init__(self, code, what, fix):
        Exception.__init__(self, code, what, fix)
        self.code = code
        self.what = what
        self.fix = fix

    def __str__(self):
        return self.what + " " + self.fix

    def _render_traceback_(self):
        # IPython asks an exception for this: a notebook shows the two sentences
        # where it would otherwise show a page of stack frames. The code is for reports
        # and for programs: course/results.py reads it in an executed notebook.
        return ["CourseError: " + self.what, self.fix, "(code: " + self.code + ")"]
