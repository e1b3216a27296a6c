"""What the tests share: tiny models, real daemons, comparisons."""
