package main

import (
	"bufio"
	"encoding/gob"
	"fmt"
	"net"
	"net/rpc"
	"reflect"

	"github.com/seed-ecb488c9/connpool"
)

// codec is the state of one connection: the client's side of package net/rpc, one call at
// a time.
type codec struct {
	*bufio.Reader // its Buffered tells the pool of bytes left unread
	w             *bufio.Writer
	enc           *gob.Encoder
	dec           *gob.Decoder
	seq           uint64
}

func newCodec(nc net.Conn) *codec {
	c := &codec{Reader: bufio.NewReader(nc), w: bufio.NewWriter(nc)}
	// The decoder reads from an io.ByteReader directly, so that nothing is
	// buffered where the pool cannot see it.
	c.enc, c.dec = gob.NewEncoder(c.w), gob.NewDecoder(c.Reader)
	return c
}

func (c *codec) call(method string, args, reply any) error {
	c.seq++
	if err := c.enc.Encode(&rpc.Request{ServiceMethod: method, Seq: c.seq}); err != nil {
		return err
	}
	if err := c.enc.Encode(args); err != nil {
		return err
	}
	if err := c.w.Flush(); err != nil {
		return err
	}
	var head rpc.Response
	if err := c.dec.Decode(&head); err != nil {
		return err
	}
	switch {
	case head.Seq != c.seq:
		return fmt.Errorf("net/rpc: the answer to call %d came to call %d", head.Seq, c.seq) // out of step: close it
	case head.Error != "":
		if err := c.dec.DecodeValue(reflect.Value{}); err != nil { // the body is empty
			return err
		}
		return connpool.Keep(rpc.ServerError(head.Error))
	}
	return c.dec.Decode(reply)
}
