"""The kernel library in other projects' hands: three trainings, each before and after the change.

    plain_loop          a PyTorch loop that computes both models' logits
    liger_jsd           a loop written against Liger-Kernel's losses
    trl_distillation    TRL's own DistillationTrainer

`python -m bench.examples` trains each both ways. It prints how many lines change, what memory the
training takes, and how far losses and weights agree.
"""
