"""What `ssmc inspect` shows as pictures: a compilation told pass by pass, drawn and as one page."""
