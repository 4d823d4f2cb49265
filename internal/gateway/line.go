package gateway

import "bytes"

// lineScanner finds frames that end with a line feed, which is part of the frame.
type lineScanner struct{}

// end returns the line feed: the end of the stream may end the last line, as most servers
// of such protocols accept.
func (lineScanner) end() string { return "\n" }

func (lineScanner) scan(b []byte) (int, bool, error) {
	if i := bytes.IndexByte(b, '\n'); i >= 0 {
		return i + 1, true, nil
	}
	return len(b), false, nil
}
