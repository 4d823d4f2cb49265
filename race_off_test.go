//go:build !race

package connpool

const raceEnabled = false
