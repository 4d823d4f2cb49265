package main

import (
	"os"
	"regexp"
	"strconv"
	"testing"
)

// README.md gives the number of defences, rounded.
func TestTheReadmeTellsHowManyDefencesThereAre(t *testing.T) {
	text, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^\| (\d+) \| defences`).FindSubmatch(text)
	if m == nil {
		t.Fatal("README.md does not tell how many defences there are")
	}
	told, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	if all := len(mutants) + len(gatewayMutants); told > all || told < all*9/10 {
		t.Errorf("README.md says %d defences, there are %d", told, all)
	}
}
