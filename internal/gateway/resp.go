package gateway

import (
	"bytes"
	"fmt"
	"strconv"
)

// The framing of RESP, the protocol of Redis: one scanner for replies of RESP2 and RESP3,
// and a stricter one for requests. The gateway must read exactly what the server reads,
// or one client's bytes become another client's commands. So a number has only one valid
// spelling, and lines end with CR LF.

// respNumber reads the number after a type byte, up to its CR LF.
type respNumber struct {
	n      int64
	digits int
	minus  bool
	stream bool // the number was a question mark: the length is not known yet
	cr     bool
}

var errRESPNumber = &malformed{"invalid length"}

// feed takes one byte and reports whether it was the last one.
func (r *respNumber) feed(c byte) (done bool, err error) {
	switch {
	case r.cr:
		if c != '\n' || r.digits == 0 && !r.stream {
			return false, errRESPNumber
		}
		return true, nil
	case c == '\r':
		r.cr = true
	case c == '-' && r.digits == 0 && !r.minus:
		r.minus = true
	case c == '?' && r.digits == 0 && !r.minus && !r.stream:
		r.stream = true
	case c < '0' || c > '9' || r.stream, r.digits > 0 && r.n == 0, r.digits >= 10:
		return false, errRESPNumber
	default:
		r.n = 10*r.n + int64(c-'0')
		r.digits++
	}
	return false, nil
}

// value returns the number. The only negative number is -1.
func (r *respNumber) value() (int64, error) {
	switch {
	case r.minus && r.n != 1:
		return 0, errRESPNumber
	case r.minus:
		return -1, nil
	}
	return r.n, nil
}

// inlineMax bounds the length of a command sent as a plain line.
const inlineMax = 64 << 10

// respRequests follows what a client sends: an array of bulk strings, or a line.
type respRequests struct {
	max   int
	state uint8
	num   respNumber
	args  int64 // bulk strings still to come
	body  int64 // bytes of the current one still to come, its CR LF included
	line  int
}

const (
	reqStart uint8 = iota
	reqInline
	reqArgs   // the number of bulk strings
	reqDollar // the dollar sign of a bulk string
	reqLength // its length
	reqBody
)

func (s *respRequests) scan(b []byte) (int, bool, error) {
	i := 0
	for i < len(b) {
		switch s.state {
		case reqStart:
			if b[i] != '*' {
				s.state, s.line = reqInline, 0
				continue
			}
			s.state, s.num = reqArgs, respNumber{}
			i++
		case reqInline:
			end := bytes.IndexByte(b[i:], '\n')
			n := end + 1
			if end < 0 {
				n = len(b) - i
			}
			i += n
			if s.line += n; s.line > inlineMax {
				return i, false, &malformed{"too big inline request"}
			}
			if end >= 0 {
				s.state = reqStart
				return i, true, nil
			}
		case reqArgs, reqLength:
			done, err := s.num.feed(b[i])
			i++
			if err == nil && done {
				done, err = s.counted()
				if err == nil && done {
					return i, true, nil
				}
			}
			if err != nil {
				return i, false, err
			}
		case reqDollar:
			if b[i] != '$' {
				return i, false, &malformed{fmt.Sprintf("expected '$', got %s", strconv.QuoteRune(rune(b[i])))}
			}
			s.state, s.num = reqLength, respNumber{}
			i++
		case reqBody:
			if s.body > 2 {
				n := min(s.body-2, int64(len(b)-i))
				s.body -= n
				i += int(n)
				continue
			}
			if b[i] != "\n\r"[s.body-1] {
				return i, false, &malformed{"a bulk string is longer than its length says"}
			}
			i++
			if s.body--; s.body == 0 {
				s.state = reqDollar
				if s.args--; s.args == 0 {
					s.state = reqStart
					return i, true, nil
				}
			}
		}
	}
	return i, false, nil
}

// counted is called when a number is complete; done says that the number ends the frame.
func (s *respRequests) counted() (done bool, err error) {
	n, err := s.num.value()
	if err != nil || s.num.stream {
		return false, errRESPNumber
	}
	if s.state == reqArgs {
		if s.state = reqDollar; n <= 0 { // an empty command, which servers do not answer
			s.state = reqStart
			return true, nil
		}
		if s.args = n; n > int64(s.max)/6 { // the shortest bulk string is "$0\r\n\r\n"
			return false, errTooLong
		}
		return false, nil
	}
	switch {
	case n < 0:
		return false, errRESPNumber
	case n > int64(s.max):
		return false, errTooLong
	}
	s.state, s.body = reqBody, n+2
	return false, nil
}

// respReplies follows what a server sends: any complete value of RESP3. An attribute is a
// part of the value after it.
type respReplies struct {
	max   int
	state uint8
	kind  byte // type of the current value
	num   respNumber
	body  int64
	cr    bool        // the last byte of a line was a CR
	open  []aggregate // incomplete aggregates, the outermost first
}

// aggregate is an incomplete array, map, set, push or attribute.
type aggregate struct {
	left      int64 // elements still to come; unused if streamed
	streamed  bool  // a '.' ends it
	attribute bool  // an attribute is not a value itself
}

const (
	repType  uint8 = iota
	repLine        // up to CR LF
	repCount       // a length or number of elements
	repBody        // a string of known length and its CR LF
	repChunk       // the type byte of the next part of a streamed string
)

// respDepth bounds the nesting of replies; servers nest a few levels.
const respDepth = 128

func (s *respReplies) scan(b []byte) (int, bool, error) {
	i := 0
	for i < len(b) {
		var ended bool // a value has ended
		switch s.state {
		case repType:
			s.kind = b[i]
			i++
			switch s.kind {
			case '+', '-', ':', '_', '#', ',', '(', '.':
				s.state, s.cr = repLine, false
			case '$', '=', '!', '*', '~', '%', '|':
				s.state, s.num = repCount, respNumber{}
			case '>':
				if len(s.open) > 0 {
					return i, false, &malformed{"a push within a reply"}
				}
				s.state, s.num = repCount, respNumber{}
			default:
				return i, false, &malformed{fmt.Sprintf("no type of RESP begins with %s", strconv.QuoteRune(rune(s.kind)))}
			}
		case repLine:
			n := bytes.IndexByte(b[i:], '\n')
			if n < 0 {
				s.cr = b[len(b)-1] == '\r'
				return len(b), false, nil
			}
			cr := s.cr
			if n > 0 {
				cr = b[i+n-1] == '\r'
			}
			i += n + 1
			if !cr {
				return i, false, &malformed{"a line that ends without CR"}
			}
			if s.kind == '.' {
				if len(s.open) == 0 || !s.open[len(s.open)-1].streamed {
					return i, false, &malformed{"the end of what did not begin"}
				}
				ended = s.closeTop()
			} else {
				ended = true
			}
			s.state = repType
		case repCount:
			done, err := s.num.feed(b[i])
			i++
			if err == nil && done {
				ended, err = s.counted()
			}
			if err != nil {
				return i, false, err
			}
		case repBody:
			if s.body > 2 {
				n := min(s.body-2, int64(len(b)-i))
				s.body -= n
				i += int(n)
				continue
			}
			if b[i] != "\n\r"[s.body-1] {
				return i, false, &malformed{"a bulk string is longer than its length says"}
			}
			i++
			if s.body--; s.body == 0 {
				s.state = repType
				if ended = s.kind != ';'; !ended {
					s.state = repChunk
				}
			}
		case repChunk:
			if b[i] != ';' {
				return i, false, &malformed{"a streamed string is broken off"}
			}
			s.kind, s.state, s.num = ';', repCount, respNumber{}
			i++
		}
		if ended && s.complete() {
			return i, true, nil
		}
	}
	return i, false, nil
}

// counted is called when a number is complete. ended says that the number ends a value.
func (s *respReplies) counted() (ended bool, err error) {
	n, err := s.num.value()
	if err != nil {
		return false, err
	}
	s.state = repType
	switch s.kind {
	case '$', '=', '!', ';':
		switch {
		case s.num.stream && s.kind == '$':
			s.state = repChunk
			return false, nil
		case s.num.stream:
			return false, errRESPNumber
		case n < 0 && s.kind == '$': // null
			return true, nil
		case n < 0:
			return false, errRESPNumber
		case n > int64(s.max):
			return false, errTooLong
		case n == 0 && s.kind == ';': // the end of a streamed string
			return true, nil
		}
		s.state, s.body = repBody, n+2
		return false, nil
	}
	a := aggregate{left: n, streamed: s.num.stream, attribute: s.kind == '|'}
	switch {
	case a.streamed && (s.kind == '|' || s.kind == '>'):
		return false, errRESPNumber
	case n < 0 && s.kind == '*': // null
		return true, nil
	case n < 0:
		return false, errRESPNumber
	case s.kind == '%' || s.kind == '|':
		a.left *= 2
	}
	switch {
	case a.left > int64(s.max)/3: // the shortest value is "_\r\n"
		return false, errTooLong
	case a.left == 0 && !a.streamed:
		return !a.attribute, nil
	case len(s.open) >= respDepth:
		return false, &malformed{fmt.Sprintf("a reply is nested more than %d levels deep", respDepth)}
	}
	s.open = append(s.open, a)
	return false, nil
}

// closeTop ends the innermost aggregate and reports whether it was a value.
func (s *respReplies) closeTop() bool {
	top := s.open[len(s.open)-1]
	s.open = s.open[:len(s.open)-1]
	return !top.attribute
}

// complete records the end of a value and of the aggregates that the value completes, and
// reports whether the whole reply has ended.
func (s *respReplies) complete() bool {
	for len(s.open) > 0 {
		top := &s.open[len(s.open)-1]
		if top.streamed {
			return false
		}
		if top.left--; top.left > 0 || !s.closeTop() {
			return false
		}
	}
	return true
}

// --- reading frames that were scanned ---

// respArgs iterates over the bulk strings of a frame that respRequests has accepted, or
// of a reply.
type respArgs struct {
	rest []byte
	left int
}

// bare returns a reply without the attributes that RESP3 may put before it.
func bare(reply []byte) []byte {
	for len(reply) > 0 && reply[0] == '|' {
		n, rest := leadingNumber(reply[1:])
		for range 2 * n { // names and values
			used, done, err := (&respReplies{max: len(rest)}).scan(rest)
			if !done || err != nil {
				return reply
			}
			rest = rest[used:]
		}
		reply = rest
	}
	return reply
}

// argsOf starts at the frame's first bulk string. A frame that is no array has none.
func argsOf(frame []byte) respArgs {
	if len(frame) == 0 || frame[0] != '*' && frame[0] != '>' {
		return respArgs{}
	}
	n, rest := leadingNumber(frame[1:])
	return respArgs{rest, n}
}

// leadingNumber reads digits and the CR LF after them.
func leadingNumber(b []byte) (n int, rest []byte) {
	for i, c := range b {
		if c < '0' || c > '9' {
			return n, b[min(i+2, len(b)):]
		}
		n = 10*n + int(c-'0')
	}
	return n, nil
}

// next returns the next bulk string. ok is false after the last one, and where another
// type follows.
func (a *respArgs) next() (arg []byte, ok bool) {
	if a.left <= 0 || len(a.rest) == 0 || a.rest[0] != '$' {
		return nil, false
	}
	n, rest := leadingNumber(a.rest[1:])
	if len(rest) < n+2 {
		return nil, false
	}
	a.left--
	a.rest = rest[n+2:]
	return rest[:n], true
}

// appendCommand appends args as an array of bulk strings.
func appendCommand(dst []byte, args ...[]byte) []byte {
	dst = append(dst, '*')
	dst = strconv.AppendInt(dst, int64(len(args)), 10)
	dst = append(dst, "\r\n"...)
	for _, a := range args {
		dst = append(dst, '$')
		dst = strconv.AppendInt(dst, int64(len(a)), 10)
		dst = append(dst, "\r\n"...)
		dst = append(dst, a...)
		dst = append(dst, "\r\n"...)
	}
	return dst
}

// splitInline splits a command that is a plain line, as Redis does: at spaces, with
// quotes, and with escapes inside double quotes.
func splitInline(line []byte) (args [][]byte, err error) {
	unbalanced := &malformed{"unbalanced quotes in request"}
	line = bytes.TrimRight(line, "\r\n")
	if bytes.IndexByte(line, 0) >= 0 {
		return nil, &malformed{"a zero byte in an inline request"}
	}
	for i := 0; ; {
		for i < len(line) && isSpace(line[i]) {
			i++
		}
		if i == len(line) {
			return args, nil
		}
		arg := []byte{}
		var quote byte
	one:
		for {
			switch {
			case i == len(line):
				if quote != 0 {
					return nil, unbalanced
				}
				break one
			case quote == 0 && isSpace(line[i]):
				break one
			case quote == 0 && (line[i] == '"' || line[i] == '\''):
				quote = line[i]
			case quote != 0 && line[i] == quote:
				if i+1 < len(line) && !isSpace(line[i+1]) {
					return nil, unbalanced
				}
				i++
				break one
			case quote == '"' && line[i] == '\\' && i+3 < len(line) && line[i+1] == 'x' && isHex(line[i+2]) && isHex(line[i+3]):
				n, _ := strconv.ParseUint(string(line[i+2:i+4]), 16, 8)
				arg = append(arg, byte(n))
				i += 3
			case quote == '"' && line[i] == '\\' && i+1 < len(line):
				i++
				c := line[i]
				if k := bytes.IndexByte([]byte("nrtba"), c); k >= 0 {
					c = "\n\r\t\b\a"[k]
				}
				arg = append(arg, c)
			case quote == '\'' && line[i] == '\\' && i+1 < len(line) && line[i+1] == '\'':
				i++
				arg = append(arg, '\'')
			default:
				arg = append(arg, line[i])
			}
			i++
		}
		args = append(args, arg)
	}
}

func isSpace(c byte) bool { return c == ' ' || '\t' <= c && c <= '\r' }

func isHex(c byte) bool {
	return '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F'
}
