"""Methods lifted from arrays to parameter trees."""
