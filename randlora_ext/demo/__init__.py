"""A real fine-tune in a few minutes: a small language model learns English spelling to phonemes.

``finetune`` is the program to copy, ``spelling`` the task, ``report`` what is shown at the end,
``__main__`` the command line.
"""
