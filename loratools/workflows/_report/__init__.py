"""What a report is made of: measures of each adapter, comparisons of every two, and the page that shows them."""
