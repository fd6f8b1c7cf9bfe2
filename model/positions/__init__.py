"""Position maps: configuration, relative positions, frequencies and their scaling, rotary caches, log n, packed documents."""
