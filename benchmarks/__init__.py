"""Speed, memory and accuracy of ``lucid.optim``, measured beside its peers."""
