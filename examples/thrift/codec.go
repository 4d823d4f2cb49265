package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"

	"github.com/apache/thrift/lib/go/thrift"

	"github.com/seed-ecb488c9/connpool"
)

const maxFrame = 16 << 20

// frames is Thrift's framed transport: each message follows its length in four bytes. It
// can report what it has read ahead and what is left of a frame, and it belongs to one
// borrower at a time.
type frames struct {
	in   *bufio.Reader
	nc   net.Conn
	left int // bytes left of the current frame
	out  bytes.Buffer
}

// The pool calls Buffered.
func (f *frames) Buffered() int { return f.in.Buffered() + f.left }

func (f *frames) Read(b []byte) (int, error) {
	if f.left == 0 {
		var size [4]byte
		if _, err := io.ReadFull(f.in, size[:]); err != nil {
			return 0, err
		}
		n := binary.BigEndian.Uint32(size[:])
		if n == 0 || n > maxFrame {
			return 0, fmt.Errorf("thrift: a frame of %d bytes", n)
		}
		f.left = int(n)
	}
	n, err := f.in.Read(b[:min(len(b), f.left)])
	f.left -= n
	return n, err
}

func (f *frames) Write(b []byte) (int, error) { return f.out.Write(b) }

func (f *frames) Flush(context.Context) error {
	frame := append(binary.BigEndian.AppendUint32(nil, uint32(f.out.Len())), f.out.Bytes()...)
	f.out.Reset()
	_, err := f.nc.Write(frame)
	return err
}

func (f *frames) RemainingBytes() uint64 { return uint64(f.left) }
func (f *frames) IsOpen() bool           { return true } // the borrower has it, so it is open
func (f *frames) Open() error            { return nil }
func (f *frames) Close() error           { return nil } // the connection belongs to the pool

func newFrames(nc net.Conn) *frames { return &frames{in: bufio.NewReader(nc), nc: nc} }

var limits = &thrift.TConfiguration{MaxMessageSize: maxFrame, MaxFrameSize: maxFrame}

// codec is the state of one connection. The library's client counts the calls, and
// detects the answer to another call.
type codec struct {
	*frames
	client *thrift.TStandardClient
}

func newCodec(nc net.Conn) *codec {
	f := newFrames(nc)
	p := thrift.NewTBinaryProtocolConf(f, limits)
	return &codec{f, thrift.NewTStandardClient(p, p)}
}

func (c *codec) call(ctx context.Context, method string, args, result thrift.TStruct) (thrift.ResponseMeta, error) {
	meta, err := c.client.Call(ctx, method, args, result)
	var exception thrift.TApplicationException
	if errors.As(err, &exception) && c.Buffered() == 0 {
		switch exception.TypeId() {
		case thrift.BAD_SEQUENCE_ID, thrift.WRONG_METHOD_NAME, thrift.INVALID_MESSAGE_TYPE_EXCEPTION:
			// The library's client found the answer to another call: close the
			// connection.
		default:
			err = connpool.Keep(err)
		}
	}
	return meta, err
}

// numbers is a structure with fields of type i32, by their ids: the arguments of divide,
// or (as field 0) its result.
type numbers map[int16]int32

func (n *numbers) Write(ctx context.Context, p thrift.TProtocol) error {
	if err := p.WriteStructBegin(ctx, "numbers"); err != nil {
		return err
	}
	for _, id := range slices.Sorted(maps.Keys(*n)) {
		if err := errors.Join(p.WriteFieldBegin(ctx, "", thrift.I32, id), p.WriteI32(ctx, (*n)[id]), p.WriteFieldEnd(ctx)); err != nil {
			return err
		}
	}
	return errors.Join(p.WriteFieldStop(ctx), p.WriteStructEnd(ctx))
}

func (n *numbers) Read(ctx context.Context, p thrift.TProtocol) error {
	*n = make(numbers)
	if _, err := p.ReadStructBegin(ctx); err != nil {
		return err
	}
	for {
		_, kind, id, err := p.ReadFieldBegin(ctx)
		switch {
		case err != nil:
			return err
		case kind == thrift.STOP:
			return p.ReadStructEnd(ctx)
		case kind != thrift.I32:
			err = p.Skip(ctx, kind)
		default:
			(*n)[id], err = p.ReadI32(ctx)
		}
		if err != nil {
			return err
		}
		if err := p.ReadFieldEnd(ctx); err != nil {
			return err
		}
	}
}

// serveCalculator knows one method.
func serveCalculator(nc net.Conn) {
	ctx := context.Background()
	p := thrift.NewTBinaryProtocolConf(newFrames(nc), limits)
	for {
		method, _, id, err := p.ReadMessageBegin(ctx)
		if err != nil {
			return
		}
		var args numbers
		if args.Read(ctx, p) != nil || p.ReadMessageEnd(ctx) != nil {
			return
		}
		var answer thrift.TStruct
		kind := thrift.REPLY
		switch {
		case method != "divide":
			kind, answer = thrift.EXCEPTION, thrift.NewTApplicationException(thrift.UNKNOWN_METHOD, "unknown method "+method)
		case args[2] == 0:
			kind, answer = thrift.EXCEPTION, thrift.NewTApplicationException(thrift.INTERNAL_ERROR, "division by zero")
		default:
			answer = &numbers{0: args[1] / args[2]}
		}
		if p.WriteMessageBegin(ctx, method, kind, id) != nil || answer.Write(ctx, p) != nil ||
			p.WriteMessageEnd(ctx) != nil || p.Flush(ctx) != nil {
			return
		}
	}
}
