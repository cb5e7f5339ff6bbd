"""One file for each verb. A package, for files of the same names are beside other folders of the package."""
