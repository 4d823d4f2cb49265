package gateway

import "bytes"

// lineScanner: a frame ends with a line feed, which is part of it.
type lineScanner struct{}

// end: the last line may be ended by the end of the stream, as most servers of
// such protocols see it.
func (lineScanner) end() string { return "\n" }

func (lineScanner) scan(b []byte) (int, bool, error) {
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		return i + 1, true, nil
	}
	return len(b), false, nil
}
