"""A real fine-tune in a few minutes: ``python -m randlora_ext.demo``.

A small pretrained language model learns to turn English spelling into phonemes with RandLoRA.

* ``__main__``: the options and the story, top to bottom
* ``assets``: where model and dictionary come from, and what to install when they are missing
* ``data``: examples, the held-out split, batches whose loss covers the answer only
* ``model``: loading, attaching the adapter, saving and reloading it, which kernels run
* ``train``: the training loop
* ``evaluate``: held-out loss and greedy answers
* ``report``: the tables, the plot and ``results.json``
"""
