"""Linear attention, with any decay: S_t = diag(exp(log_decay_t)) S_{t-1} + k_t v_t^T."""
